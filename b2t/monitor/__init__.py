"""Monitors hooked to the engine step, alerts, sinks, reports."""
