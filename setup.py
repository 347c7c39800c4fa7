"""Packaging for hctrain.  Every value comes from settings.ini, the file nbdev reads as well."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def deps(key):
    return cfg.get(key, "").split()


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["hctrain", "hctrain.*"]),
    package_data={"hctrain": ["data/*"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=deps("requirements"),
    extras_require={
        "acs": deps("acs_requirements"),
        "cluster": deps("cluster_requirements"),
        "peers": deps("acs_requirements") + deps("peers_requirements"),
        "dev": deps("acs_requirements") + deps("cluster_requirements") + deps("dev_requirements"),
    },
    entry_points={
        "console_scripts": ["hctrain=hctrain.cli:main"],
        "nbdev": ["hctrain=hctrain._modidx:d"],  # lets other nbdev projects link to this one's API docs
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
