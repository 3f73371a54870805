"""Programs that manuals run as files. Nothing here may have the name of a standard module: the folder of a file that
is run stands first on the import path.
"""
