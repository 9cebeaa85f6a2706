"""
Convert a checkpoint into a GGUF file with llama.cpp's own converter:

    git clone https://github.com/ggml-org/llama.cpp
    python examples/to_gguf.py llama.cpp out/stdlib stdlib.gguf
    python examples/to_gguf.py llama.cpp out/stdlib stdlib.q8.gguf --outtype q8_0
    llama-server -m stdlib.gguf                             # or any other program of llama.cpp

The converter recognizes a tokenizer by a hash of the ids it gives to a sample text, so it cannot
know one that was trained here. This script tells it how ours split a text: as GPT-2 does.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # plainGPT's files

from configurator import UserError
from plaingpt.checkpoint import folders
from plaingpt.text.tokenizer import Tokenizer


def main(llama_cpp: str, where: str, out_file: str, *options: str) -> None:
    """Call the converter, with any `options` of its own.

    Raises UserError if it is missing, the checkpoint is an adapter, or GGUF cannot express its
    tokenizer.
    """
    folder = folders.find(where)
    if folders.is_adapter(folder):
        raise UserError(f"{folder} is an adapter: merge it first, with python -m tools.export")
    if not (Path(llama_cpp) / "convert_hf_to_gguf.py").exists():
        raise UserError(f"{llama_cpp} is not a copy of llama.cpp: no convert_hf_to_gguf.py in it")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.digits or tokenizer.vocab_size < 258:
        raise UserError(f"{folder}: GGUF takes a BPE with merges that splits texts as GPT-2 does")
    sys.path.insert(0, llama_cpp)
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", str(folder), *options, "--outfile", out_file]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    if len(sys.argv) < 4 or {"-h", "--help"} & set(sys.argv):
        print(__doc__.strip())
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: llama.cpp's converter needs {error.name}: pip install {error.name}")
