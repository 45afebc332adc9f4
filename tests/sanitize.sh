#!/bin/sh
# `make sanitize`: build the extension with AddressSanitizer and UndefinedBehaviorSanitizer in a copy of the tree, and run
# the op tests on it. Stops at the first report.  sh tests/sanitize.sh [pytest arguments]
set -eu
root=$PWD
copy=$root/build/sanitize
python=$root/.venv/bin/python
rm -rf "$copy"
mkdir -p "$copy"
cp -r csrc fastlm kernels tests setup.py pyproject.toml README.md LICENSE "$copy"
rm -f "$copy"/fastlm/*.so
cd "$copy"
FASTLM_SANITIZE=address,undefined "$python" setup.py -q build_ext --inplace
# leaks are the interpreter's; operators new and delete pair up across torch's libraries, which are not instrumented
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:halt_on_error=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export PYTHONPATH="$copy" # before the editable install, which maps fastlm to the tree
"$python" -P -c "import fastlm; assert fastlm.__file__.startswith('$copy'), fastlm.__file__"
ops="boundary rms_norm rope glu attention varlen_attention paged_attention cross_entropy linear_cross_entropy quantized_linear optim"
for op in $ops; do
  test -f tests/test_$op.py && set -- "$@" tests/test_$op.py
done
exec "$python" -P -m pytest -q -m 'not slow' -k 'not compile and not environment' "$@"
