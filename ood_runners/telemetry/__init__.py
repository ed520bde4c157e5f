"""Seeing inside a running service: metrics, request ids in logs, spans."""
