"""What an installation must be able to do, by what was installed: `python scripts/package_check.py core`.

Imports every module of the package. One that is not there may only be missing because of an extra that was not asked
for. Then a shipped checkpoint is read and writes an adapter's tensors.
"""

import importlib
import pkgutil
import sys

EXTRAS = {
    "embedded": ("gguf",),
    "train": ("pyarrow", "tensorboard", "accelerate"),
    "data": ("datasets", "pyarrow"),
    "eval": ("pyarrow", "scipy"),
    "library": ("pyarrow",),
    "serve": ("fastapi", "uvicorn", "prometheus_client", "starlette"),
    "lm-eval": ("lm_eval", "accelerate"),
    "ray": ("ray", "pyarrow"),
}
CORE = ("adapter", "checkpoint", "cli", "gguf_export", "hub", "library", "merge", "peft_io", "session", "text_to_lora")


def main(name: str) -> None:
    """Checks the installation."""
    import t2l

    has = set(EXTRAS.get(name, ())) | (set(EXTRAS["embedded"]) if name == "lowest" else set())
    optional = {package for packages in EXTRAS.values() for package in packages} | {"numpy"} - has
    modules = [m.name for m in pkgutil.walk_packages(t2l.__path__, "t2l.") if not m.name.endswith("__main__")]
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in optional - has or module.split(".")[1] in CORE:
                raise
            print(f"{module} needs {missing}")
    for package in has:
        importlib.import_module(package)
    from t2l.checkpoint import load_checkpoint
    from t2l.text_to_lora import DEFAULT, checkpoint_folder

    checkpoint = load_checkpoint(checkpoint_folder(DEFAULT))
    print(
        f"{name}: {len(modules)} modules, {sum(p.numel() for p in checkpoint.hypernet.parameters()):,} parameters read"
    )


if __name__ == "__main__":
    main(sys.argv[1])
