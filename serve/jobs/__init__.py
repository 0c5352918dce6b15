"""Offline batch work: folders of images and clips to files of captions.

A job is a fold over the same stream of events that HTTP and Python read. No Ray and no HTTP here.
"""
