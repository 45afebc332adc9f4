#!/bin/sh
# Runs the CUDA kernels on the emulator with sanitizers, from a copy of fastlm/ (build/simt-<sanitizer>/site):
#     sh tests/support/sanitize_simt.sh address|thread [test file ...]        default: all tests of CUDA kernels
# AddressSanitizer and UndefinedBehaviorSanitizer check what a kernel does outside load and store. ThreadSanitizer finds two
# CUDA threads that access global memory without synchronization. The exit status is non-zero after any finding.
set -eu
sanitizer=$1
shift
root=$PWD
site=$root/build/simt-$sanitizer/site
python=$root/.venv/bin/python
test $# -gt 0 || set -- --ignore tests/kernels/test_cuda_gate.py tests/kernels
rm -rf "$site"
mkdir -p "$site"
cp -a fastlm "$site"
rm -f "$site"/fastlm/_simt*.so "$site"/fastlm/_cuda*.so # _cpu stays: it is not compiled with the sanitizer
export FASTLM_CUDA=0 FASTLM_SIMT=1 FASTLM_CPU=0
case $sanitizer in
address)
  export FASTLM_SANITIZE=address,undefined
  preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
  ;;
thread)
  export FASTLM_SANITIZE=thread
  preload=$(g++ -print-file-name=libtsan.so)
  ;;
*)
  echo "sanitize_simt: expected address or thread, got $sanitizer" >&2
  exit 2
  ;;
esac
"$python" setup.py -q build_ext --build-lib "$site"
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:detect_stack_use_after_return=0:halt_on_error=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
# ThreadSanitizer does not check fibers that hold locks of libraries, and not torch
export TSAN_OPTIONS=halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1
export OMP_NUM_THREADS=1
export PYTHONPATH="$site"
LD_PRELOAD=$preload "$python" -P -m pytest -q --all --capture=sys -p no:faulthandler --tb=short -m "not slow" --kernels cuda "$@" ||
  { echo "sanitize_simt: FINDINGS under $sanitizer"; exit 1; }
echo "sanitize_simt: clean under $sanitizer"
