"""Everanimate: animate a character from one picture with the motion of a video."""

from importlib.metadata import version

__version__ = version("everanimate")
