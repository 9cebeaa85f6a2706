"""Whether there is a network, asked once before libraries that would retry for minutes."""

import ssl
import threading
import urllib.error
import urllib.request

SECONDS = 6.0  # for an answer of any kind


def require_answer(url: str) -> None:
    """Raises ConnectionError if no server, or proxy, answers at `url` within SECONDS.

    Looking up the host name has no time limit, so a thread does the asking.
    """
    if any(proxy.startswith("socks") for proxy in urllib.request.getproxies().values()):
        return  # urllib cannot use them; the libraries may
    problems: list[BaseException] = [TimeoutError(f"nothing within {SECONDS:g} seconds")]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer
        except Exception as error:  # reported below
            reason = getattr(error, "reason", error)
            if not isinstance(reason, ssl.SSLError):  # libraries may have other certificates
                problems[0] = reason
                return
        problems.clear()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if problems:
        raise ConnectionError(f"no answer from {url} ({problems[0]}): is there a network?")
