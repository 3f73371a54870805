"""The output folder: staging, journal, atomic publishing, and the small files of a model.

Here: writing. Not here: computing, or deciding what to write (``planning`` does). To add a small file, add it to
``api.run_merge``'s documents.
"""
