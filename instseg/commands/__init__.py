"""The commands of ``instseg``, a file each.

What a command needs beside its arguments is imported when it runs, so that ``instseg --help`` works
without torch.
"""
