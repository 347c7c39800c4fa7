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
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["hctrain", "hctrain.*"]),
    python_requires=">=" + cfg["min_python"],
    install_requires=deps("requirements"),
    extras_require={"dev": deps("dev_requirements")},
    # Lets other nbdev projects link to this one's API docs.
    entry_points={"nbdev": ["hctrain=hctrain._modidx:d"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
    ],
    zip_safe=False,
)
