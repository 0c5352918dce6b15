"""Jobs over tables, archives and folders: rows in, answers in shards out, one chat request per row and prompt.

Where a row is answered is an HTTP address, or the same application in this process; the job knows no difference.
"""
