"""Families of tasks: sources that draw episodes without end."""

from bayesmeta.data.families.image_classes import ImageClasses

__all__ = ["ImageClasses"]
