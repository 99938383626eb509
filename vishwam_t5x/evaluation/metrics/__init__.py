"""Metrics in plain NumPy: functions of targets and predictions."""
