"""Export a GGUF file for OpenVINO by its own route: optimum-intel, with weights of 4 or 8 bits.

    bench/.venv/optimum/bin/python bench/peers/openvino_export.py FILE.gguf FOLDER [--bits 8]
    python bench/peers/decode.py --model FILE.gguf --openvino FOLDER

transformers reads the GGUF file as a model in float32 and optimum-intel writes FOLDER, with the
tokenizer. optimum-intel needs a transformers of its own, hence an environment of its own:

    python3 -m venv bench/.venv/optimum
    bench/.venv/optimum/bin/pip install "optimum-intel[openvino]" gguf accelerate
"""

import argparse
import tempfile
from pathlib import Path


def export(path: Path, folder: Path, bits: int) -> None:
    from optimum.exporters.openvino.convert import export_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    # symmetric groups of 64, the largest that divide SmolLM2's rows; the head has 8 bits, as in
    # llama.cpp's files
    options = {"sym": True, "group_size": 64, "ratio": 1.0} if bits == 4 else {}
    with tempfile.TemporaryDirectory() as checkpoint:
        AutoModelForCausalLM.from_pretrained(**where).save_pretrained(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        tokenizer.save_pretrained(checkpoint)
        model = OVModelForCausalLM.from_pretrained(
            checkpoint,
            export=True,
            quantization_config=OVWeightQuantizationConfig(bits=bits, **options),
        )
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    export_tokenizer(tokenizer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, metavar="FILE.gguf")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    options = parser.parse_args()
    export(options.model.absolute(), options.folder, options.bits)


if __name__ == "__main__":
    main()
