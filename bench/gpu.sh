#!/bin/sh
# On a machine with a GPU: build fastlm for its Python ($PYTHON, .venv or python3), run the tests that need the GPU, then bench/gpu.py. Every step has a time
# limit and prints its results so far: `tests triton cuda` takes less than ten minutes, and so does `bench compare`. Not run on a GPU yet.
#     sh bench/gpu.sh [folder for results] [tests|triton|cuda|bench|compare ...]        default: bench/results, all but compare
# compare: run bench again with Triton where CUDA C++ is selected, two minutes; the order of BACKENDS in fastlm/backend.py should follow its result.
# Nothing is downloaded: bring packages that the machine lacks as wheels, on PYTHONPATH; ninja may be on PATH instead. Every step runs, even after a failure.
set -u
out=${1:-bench/results}
test $# -gt 0 && shift
steps=${*:-tests triton cuda bench}
test -x .venv/bin/python && python=.venv/bin/python || python=python3
python=${PYTHON:-$python}
here=$(pwd)
status=0

$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || {
  echo "gpu.sh: expected a GPU that the torch of $python sees, got none"
  exit 1
}
mkdir -p "$out"
site=$(mktemp -d) # stands in for an installation: fastlm, and ./kernels as fastlm.kernels
# CUDA kernels for this card only: a third of the build time
capability=$($python -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a > 8))')
export FASTLM_CUDA_ARCHS="$capability"
# Without the extensions everything still runs except the CUDA kernels and some tests' imports
timeout 150 $python setup.py -q build_ext --inplace >"$out/gpu-build.log" 2>&1 || {
  status=1
  echo "gpu.sh: the C++ extension does not build, continuing without it: $out/gpu-build.log"
  tail -n 5 "$out/gpu-build.log"
}
ln -s "$here/fastlm" "$site/fastlm"
test -e fastlm/kernels || ln -s ../kernels fastlm/kernels # ignored by git
trap 'rm -f fastlm/kernels; rm -rf "$site"' EXIT
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# -W default: a warning due to this machine's versions is not a failure. SIGINT: pytest still reports its results so far
pytest="timeout -s INT -k 10"
parallel=
$python -c 'import xdist' 2>/dev/null && parallel="-n 8" # most of the time is compilation, one core per process
for step in $steps; do
  case $step in
  tests)
    $pytest 140 $python -m pytest -q -W default --all tests/kernels/test_gpu.py >"$out/gpu-tests.log" 2>&1 || status=1
    tail -n 25 "$out/gpu-tests.log"
    ;;
  triton)
    # the gate compiles for other GPUs
    $pytest 110 $python -m pytest -q -W default --all $parallel --maxfail=20 --kernels triton --ignore tests/kernels/test_triton_gate.py tests/kernels >"$out/gpu-triton.log" 2>&1 || status=1
    tail -n 25 "$out/gpu-triton.log"
    ;;
  cuda)
    # first check of what the emulator cannot show: fragment layouts, memory order
    $pytest 60 $python -m pytest -q -W default --all $parallel --maxfail=20 --kernels cuda --ignore tests/kernels/test_cuda_gate.py tests/kernels >"$out/gpu-cuda.log" 2>&1 || status=1
    tail -n 25 "$out/gpu-cuda.log"
    if command -v compute-sanitizer >/dev/null; then
      for tool in memcheck racecheck; do
        timeout 45 compute-sanitizer --tool $tool --error-exitcode 9 $python -m pytest -q -W default -x -k "float16 and (rows or repeats)" --kernels cuda tests/kernels/test_rms_norm.py >"$out/gpu-$tool.log" 2>&1 || status=1
        tail -n 3 "$out/gpu-$tool.log"
      done
    else
      echo "gpu.sh: compute-sanitizer is not on PATH: memcheck and racecheck did not run"
    fi
    ;;
  bench)
    timeout -s INT -k 10 230 $python bench/gpu.py --seconds 200 >"$out/gpu.txt" 2>"$out/gpu-bench.log" || status=1
    cat "$out/gpu.txt"
    tail -n 5 "$out/gpu-bench.log"
    grep '^{' "$out/gpu.txt" >"$out/gpu.jsonl"
    ;;
  compare)
    FASTLM_BACKEND=triton timeout -s INT -k 10 130 $python bench/gpu.py --seconds 110 quantized_linear paged_attention cross_entropy adamw rows rope >"$out/gpu-compare.txt" 2>&1 || status=1
    tail -n 40 "$out/gpu-compare.txt"
    grep '^{' "$out/gpu-compare.txt" >"$out/gpu-compare.jsonl"
    ;;
  *)
    echo "gpu.sh: steps: expected tests, triton, cuda, bench or compare, got $step"
    exit 2
    ;;
  esac
done
exit $status
