#!/bin/sh
# The CUDA kernels on the emulator under sanitizers, in a copy of the tree (build/simt-<sanitizer>; objects are kept):
#     sh tests/sanitize_simt.sh address|thread [test file ...]        default: tests/test_cuda_*.py
# AddressSanitizer and UndefinedBehaviorSanitizer see what a kernel does past load and store; ThreadSanitizer sees two
# CUDA threads that touch global memory without an order. Ends non-zero if one has a finding.
set -eu
sanitizer=$1
shift
root=$PWD
copy=$root/build/simt-$sanitizer
python=$root/.venv/bin/python
test $# -gt 0 || set -- tests/test_cuda_*.py
mkdir -p "$copy"
for part in csrc fastlm kernels tests bench setup.py pyproject.toml README.md LICENSE; do
  rm -rf "${copy:?}/$part"
  cp -a "$part" "$copy" # -a keeps times, by which objects are found up to date
done
cd "$copy"
rm -f fastlm/_simt*.so fastlm/_cuda*.so # _cpu stays as it is: it is compiled without
export FASTLM_CUDA=0 FASTLM_SIMT=1 FASTLM_CPU=0
case $sanitizer in
address)
  FASTLM_SANITIZE=address,undefined "$python" setup.py -q build_ext --inplace
  preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
  ;;
thread)
  FASTLM_SANITIZE=thread "$python" setup.py -q build_ext --inplace
  preload=$(g++ -print-file-name=libtsan.so)
  ;;
*)
  echo "sanitize_simt: wanted address or thread, got $sanitizer" >&2
  exit 2
  ;;
esac
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:detect_stack_use_after_return=0:halt_on_error=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
# fibers that hold locks of libraries, and torch itself, are not what is looked at
export TSAN_OPTIONS=halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1
export OMP_NUM_THREADS=1
mkdir -p site
ln -sfn ../fastlm site/fastlm
export PYTHONPATH="$copy/site"
LD_PRELOAD=$preload "$python" -P -m pytest -q --capture=sys -p no:faulthandler --tb=short -m "not slow" "$@" ||
  { echo "sanitize_simt: FINDINGS under $sanitizer"; exit 1; }
echo "sanitize_simt: clean under $sanitizer"
