"""Package metadata. Versions are pinned in constraints.txt, tools are set in pyproject.toml."""

import hashlib
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# read as text, because importing the package needs its dependencies
(VERSION,) = re.findall(
    r'^VERSION = "(.+)"$', (ROOT / "pynq_kgrc" / "version.py").read_text("utf-8"), re.MULTILINE
)

# folders outside pynq_kgrc/ that are installed as its subpackages (pynq_kgrc/files.py)
FOLDERS = {
    "pynq_kgrc.hls_src": "hls_src",
    "pynq_kgrc.overlays": "overlays",
    "pynq_kgrc.notebooks": "notebooks",
    "pynq_kgrc.clips": "examples/clips",
}

KERNELS = Path("pynq_kgrc/backends/native/kernels")
sources = sorted((ROOT / KERNELS).glob("*.*"))
digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]

# a plain library that ctypes loads (pynq_kgrc/backends/native/library.py); without a C compiler
# the package is installed without it
NATIVE = Extension(
    "pynq_kgrc.backends.native._kernels",
    [str(KERNELS / path.name) for path in sources if path.suffix == ".c"],
    depends=[str(KERNELS / path.name) for path in sources],
    define_macros=[("KGRC_SOURCES", f'"{digest}"')],
    extra_compile_args=["-std=gnu11", "-O3", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
)


class PlainLibrary(build_ext):
    """Build a library of any Python: its name says none."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"


class AnyPython(bdist_wheel):
    """Make a wheel for this kind of machine and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    name="pynq_kgrc",
    version=VERSION,
    description="3-D CNN action recognition on an FPGA with balanced kernel group sparsity",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="pynq_kgrc contributors",
    license_expression="BSD-3-Clause",
    license_files=["LICENSE", "LICENSES.md"],
    keywords=[
        *("action recognition", "3-D CNN", "video", "FPGA", "PYNQ", "HLS", "accelerator"),
        *("pruning", "quantization", "structured sparsity", "ZCU102"),
    ],
    # no "License ::" classifier: a licence expression replaces it (PEP 639)
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: C",
        "Programming Language :: C++",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Topic :: System :: Hardware",
        "Typing :: Typed",
    ],
    python_requires=">=3.10,<3.13",
    packages=[*find_packages(include=["pynq_kgrc", "pynq_kgrc.*"]), *FOLDERS],
    package_dir=FOLDERS,
    ext_modules=[NATIVE],
    cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython},
    package_data={
        "pynq_kgrc": [
            "py.typed",
            "labels/*.txt",
            "service/page/*",
            "programs/*",
            "analysis/*.json",
        ],
        "pynq_kgrc.backends.native": ["kernels/*.*"],
        "pynq_kgrc.hls_src": [
            *(
                "Makefile",
                "*.*",
                "checks/*.*",
                "checks/stubs/*.*",
                "checks/stubs/*/*.*",
                "rtl/*.*",
                "scripts/*.*",
            ),
        ],
        # includes a bitstream and its .hwh if they were built in this checkout
        "pynq_kgrc.overlays": ["README.md", "*/manifest.json", "*/kgrc.bit", "*/kgrc.hwh"],
        "pynq_kgrc.notebooks": ["*.ipynb"],
        "pynq_kgrc.clips": ["*.*", "calibration/*.*", "depth/*.*"],
    },
    install_requires=[
        "numpy>=1.21.5",
        "msgspec>=0.18",
        "safetensors>=0.4",
        "threadpoolctl>=3.1",
        "tqdm>=4.60",
        "av>=15,<19",  # FFmpeg: decodes videos; 19 changes its API, for Python 3.10 it ends with 17
        # provides the module cv2 as opencv-python does, but needs no X11 libraries
        "opencv-python-headless>=4.8,<4.12",
    ],
    extras_require={
        "board": ["pynq>=3.0.1,!=3.1.1", "numpy<2", "pycparser<3", "setuptools<=80"],
        "train": ["torch>=2.6", "tomli-w>=1.0", "tomli>=2.0; python_version < '3.11'"],
        # networks as ONNX files; needs no torch
        "onnx": ["onnx>=1.16"],
        "serve": [
            "fastapi>=0.162",
            "starlette>=1.7",  # older versions do not enforce form limits (CVE-2026-54283)
            "uvicorn>=0.40",
            "h11>=0.16",
            "websockets>=15",
            "prometheus-client>=0.20",
            # older versions do not limit the headers of a part (CVE-2026-42561)
            "python-multipart>=0.0.32",
        ],
        # the Open Inference Protocol over gRPC; install together with serve. Any version since
        # grpcio-tools 1.64, which pynq 4.0 installs
        "grpc": ["grpcio>=1.64", "protobuf>=5.26"],
        # batches and several boards behind one endpoint; install together with serve.
        # pyarrow 26 needs numpy 2, pynq needs numpy 1
        "cluster": ["ray[data,serve]>=2.60", "pyarrow>=17,<26", "aiohttp>=3.12"],
        # clients that the tests of the service use
        "clients": [
            *("tritonclient[http]", "schemathesis", "playwright"),
            "axe-playwright-python",  # the rules for accessible pages
        ],
        "plots": ["matplotlib>=3.6"],
        # to open the notebooks on a computer; a PYNQ image already has Jupyter
        "notebooks": ["notebook", "matplotlib>=3.6"],
        "bench": ["onnx", "onnxruntime", "openvino", "psutil"],
        "dev": [
            *("pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy"),
            *("matplotlib", "onnx", "onnxruntime"),
            # host_tests/test_notebooks.py executes the notebooks
            *("nbclient", "nbformat", "ipykernel"),
            "gunicorn",  # forks workers after it has loaded the application
            # host_tests/test_hls_lint.py parses hls_src; make check-cpp compares its format
            *("libclang", "clang-format"),
            # host_tests/test_docs.py parses the Markdown files
            "markdown-it-py",
        ],
        # make docs
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
    },
    entry_points={
        "console_scripts": ["pynq-kgrc=pynq_kgrc.cli:main"],
        # groups that pynq reads: bitstreams by name, the notebooks that `pynq get-notebooks`
        # copies, and drivers, which every pynq.Overlay imports
        "pynq.overlays": ["pynq_kgrc=pynq_kgrc.overlays"],
        "pynq.notebooks": ["pynq_kgrc=pynq_kgrc.notebooks"],
        "pynq.lib": ["pynq_kgrc=pynq_kgrc.backends.board.kernel"],
    },
)
