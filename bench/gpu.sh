#!/bin/sh
# On a machine with a GPU: builds fastlm for the Python there ($PYTHON, .venv or python3), runs the tests that need the GPU, then
# bench/gpu.py; under ten minutes in all. Not run on a GPU yet.
#     sh bench/gpu.sh [folder for results]        default: bench/results
# Nothing is fetched: packages that are missing there travel as wheels, on PYTHONPATH. Every step runs, whatever failed before.
set -u
out=${1:-bench/results}
mkdir -p "$out"
test -x .venv/bin/python && python=.venv/bin/python || python=python3
python=${PYTHON:-$python}
here=$(pwd)
site=$(mktemp -d) # stands for an installation: fastlm, and ./kernels as fastlm.kernels
status=0

$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu.sh: wanted a GPU that the torch of $python sees, got none"
  exit 1
}
$python setup.py -q build_ext --inplace >"$out/gpu-build.log" 2>&1 || {
  echo "gpu.sh: the C++ extension does not build: $(tail -n 1 "$out/gpu-build.log") ($out/gpu-build.log)"
  exit 1
}
ln -s "$here/fastlm" "$site/fastlm"
test -e fastlm/kernels || ln -s ../kernels fastlm/kernels # ignored by git
trap 'rm -f fastlm/kernels; rm -rf "$site"' EXIT
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

timeout 280 $python -P -m pytest -q tests/test_gpu.py >"$out/gpu-tests.log" 2>&1 || status=1
tail -n 15 "$out/gpu-tests.log"
timeout 120 $python -P -m pytest -q --maxfail=20 --ignore=tests/test_triton_gate.py tests/test_triton_*.py >"$out/gpu-triton.log" 2>&1 || status=1
tail -n 15 "$out/gpu-triton.log"
timeout 280 $python -P bench/gpu.py >"$out/gpu.txt" 2>"$out/gpu-bench.log" || status=1
cat "$out/gpu.txt"
tail -n 1 "$out/gpu.txt" >"$out/gpu.json"
exit $status
