"""Configuration presets shipped with the package."""
