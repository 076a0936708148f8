"""Networks in plain torch, their weights, and the road from a torch module to a Graph."""

NETWORKS = {
    "c3d": ("pynq_kgrc.models.c3d", "c3d"),
    "r2plus1d_18": ("pynq_kgrc.models.r2plus1d", "r2plus1d_18"),
    "thin_c3d": ("pynq_kgrc.models.thin", "thin_c3d"),
    "thin_r2plus1d": ("pynq_kgrc.models.thin", "thin_r2plus1d"),
    "i3d": ("pynq_kgrc.models.i3d", "i3d"),
}
"""For each network its module, which also has CLIP, and the function there that takes `classes`.

Names only, so that a board without torch can read the list.
"""
