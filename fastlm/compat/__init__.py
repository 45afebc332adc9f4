"""Other libraries' names on fastlm's kernels: a user changes an import and nothing else.

`fastlm.compat.flash_attn` has flash-attn's functions, `fastlm.compat.liger` Liger-Kernel's losses,
norms and MLPs. Each module says where its results differ from the namesake's; an argument that
no kernel here serves is refused with its name. Nothing of those libraries is imported.
"""
