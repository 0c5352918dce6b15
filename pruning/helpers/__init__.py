"""What several reducers share."""
