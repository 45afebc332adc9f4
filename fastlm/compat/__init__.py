"""Other libraries' interfaces on fastlm's kernels: a user changes only an import.

`fastlm.compat.flash_attn` has flash-attn's functions, `fastlm.compat.liger` Liger-Kernel's losses,
modules and ``apply_liger_kernel_to_*``; nothing of those libraries is imported.
`fastlm.compat.trl` has TRL's SFTTrainer with the loss of a patched model. Each module states where
its results differ from the original's. An argument that no kernel here supports is refused by name.
"""
