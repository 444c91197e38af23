"""What runs beside the engine step: monitors, alerts, sinks."""
