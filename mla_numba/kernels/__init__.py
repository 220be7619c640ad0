"""The kernels: one module each; `docs/map.md` says in which order to read them."""
