"""The version, read by the build and by the package."""

VERSION = "0.2.0"
