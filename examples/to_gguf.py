"""
Turn a checkpoint into a GGUF file, with llama.cpp's own converter:

    git clone https://github.com/ggml-org/llama.cpp
    python examples/to_gguf.py llama.cpp out/stdlib stdlib.gguf
    llama-server -m stdlib.gguf                             # or any other program of llama.cpp

The converter knows tokenizers by a hash of the ids that they give to a text, and so none that was
trained here. What it has to be told is how they split a text: as GPT-2 does.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # plainGPT's files

from plaingpt.checkpoint import folders
from plaingpt.text.tokenizer import Tokenizer


def main(llama_cpp: str, where: str, out_file: str) -> None:
    """Raises ValueError without a converter, for an adapter, and for a tokenizer that GGUF cannot
    say."""
    folder = folders.find(where)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is an adapter: merge it first, with export.py")
    if not (Path(llama_cpp) / "convert_hf_to_gguf.py").exists():
        raise ValueError(f"{llama_cpp} is no copy of llama.cpp: it has no convert_hf_to_gguf.py")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.digits or tokenizer.vocab_size < 258:
        raise ValueError(f"{folder}: GGUF takes a BPE with merges that splits texts as GPT-2 does")
    sys.path.insert(0, llama_cpp)
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", out_file]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
