"""Inference brings models and guides together: objectives, SVI, EM, evidence, ledger, comparison."""

if __name__ != "elbozoo.inference":
    raise ImportError(
        "this folder is elbozoo.inference: write 'from elbozoo.inference import ...', never 'import inference'"
    )
