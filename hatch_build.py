"""Build hook: adds the recipes to the wheel, and the compiled kernels if STATEFEED_WHEEL_TORCH is torch's folder."""

import importlib.util
import os
import platform
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "standard":  # an editable install finds both in the checkout
            return
        build_data["force_include"][str(Path(self.root) / "recipes")] = "statefeed/recipes"
        torch = os.environ.get("STATEFEED_WHEEL_TORCH")
        if not torch:
            return
        spec = importlib.util.spec_from_file_location("compile", Path(self.root) / "statefeed/native/compile.py")
        compile_module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compile_module)
        self.libraries = tempfile.TemporaryDirectory()
        for variant in compile_module.VARIANTS:
            if variant.machine == platform.machine():
                library = Path(self.libraries.name) / f"{variant.name}.so"
                compile_module.compile_library(library, Path(torch), [*variant.flags, "-s"])
                build_data["force_include"][str(library)] = f"statefeed/native/prebuilt/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, *_: Any) -> None:
        if hasattr(self, "libraries"):
            self.libraries.cleanup()
