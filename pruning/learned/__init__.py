"""Reducers with trained weights, and the networks that they and their trainings share."""
