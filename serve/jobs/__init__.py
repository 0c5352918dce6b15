"""Offline batch jobs."""
