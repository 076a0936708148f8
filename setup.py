"""Package metadata. Versions are pinned in constraints.txt, tools set in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# folders that travel inside the package; pynq_kgrc/places.py finds them in either place
FOLDERS = {
    "pynq_kgrc.hls_src": "hls_src",
    "pynq_kgrc.overlays": "overlays",
    "pynq_kgrc.notebooks": "notebooks",
    "pynq_kgrc.clips": "examples/clips",
}

setup(
    name="pynq_kgrc",
    version="0.1.0",
    description="3-D CNN action recognition on an FPGA with balanced kernel group sparsity",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.13",
    packages=[*find_packages(include=["pynq_kgrc", "pynq_kgrc.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        "pynq_kgrc": ["py.typed", "labels/*.txt", "service/page/*", "programs/*"],
        "pynq_kgrc.hls_src": ["Makefile", "*.*", "rtl/*.*", "scripts/*.*"],
        # a bitstream and its .hwh too, where somebody has built them
        "pynq_kgrc.overlays": ["README.md", "*/manifest.json", "*/kgrc.bit", "*/kgrc.hwh"],
        "pynq_kgrc.notebooks": ["*.ipynb"],
        "pynq_kgrc.clips": ["*.*", "calibration/*.*"],
    },
    install_requires=[
        "numpy>=1.23",
        "msgspec>=0.18",
        "safetensors>=0.4",
        "threadpoolctl>=3.1",
        "tqdm>=4.60",
        # the same module as opencv-python, without the X11 libraries that a bare server lacks
        "opencv-python-headless>=4.8",
    ],
    extras_require={
        "board": ["pynq>=3.0.1", "pycparser<3", "setuptools<=80"],
        "train": ["torch>=2.6", "tomli-w>=1.0", "tomli>=2.0; python_version < '3.11'"],
        "serve": [
            "fastapi>=0.162",
            "starlette>=1.7",  # below: form limits that are not kept (CVE-2026-54283)
            "uvicorn>=0.40",
            "h11>=0.16",
            "websockets>=15",
            "av>=17",
            "prometheus-client>=0.20",
            "python-multipart>=0.0.32",  # below: unbounded headers of parts (CVE-2026-42561)
        ],
        # many boards or processes as one; needs serve. pyarrow 26 refuses the numpy of pynq (<2)
        "cluster": ["ray[data,serve]>=2.60", "pyarrow>=17,<26", "aiohttp>=3.12"],
        # the service as its clients see it
        "clients": ["tritonclient[http]", "schemathesis", "playwright"],
        "plots": ["matplotlib>=3.6"],
        # to open the notebooks where there is no Jupyter; a PYNQ image has one
        "notebooks": ["notebook", "matplotlib>=3.6"],
        "bench": ["onnx", "onnxruntime", "openvino", "psutil"],
        "dev": [
            *("pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy"),
            *("matplotlib", "onnx", "onnxruntime"),
            # run the notebooks
            *("nbclient", "nbformat", "ipykernel"),
            # reads hls_src for the lint (host_tests/test_hls_lint.py)
            "libclang",
        ],
    },
    entry_points={
        "console_scripts": ["pynq-kgrc=pynq_kgrc.cli:main"],
        # where pynq looks: for x/x.bit by name, for what get-notebooks copies, and for drivers,
        # which every pynq.Overlay imports
        "pynq.overlays": ["pynq_kgrc=pynq_kgrc.overlays"],
        "pynq.notebooks": ["pynq_kgrc=pynq_kgrc.notebooks"],
        "pynq.lib": ["pynq_kgrc=pynq_kgrc.backends.board.kernel"],
    },
)
