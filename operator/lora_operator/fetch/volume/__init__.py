"""What Jobs do on the cache's volume: its layout and its limits, the locks of files and of stores, and the snapshots that engines read.

Nothing here knows where content comes from, and nothing judges it.
"""
