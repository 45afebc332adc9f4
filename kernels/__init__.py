"""Triton kernels, one file per op; installed as ``fastlm.kernels``."""

if __name__ == "kernels":
    # The root of a clone is on sys.path, but the importer expects PyPI's package of this name:
    # import that one instead. Where it is not installed, put an empty module without a file in
    # place of this folder, so that transformers sees that the package is missing.
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from types import ModuleType

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    elsewhere = [p for p in sys.path if os.path.abspath(p or ".") != root]
    spec = PathFinder.find_spec(__name__, elsewhere)
    if spec is None or spec.loader is None:
        sys.modules[__name__] = ModuleType(__name__)
    else:
        sys.modules[__name__] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
