"""The commands of ``instseg``, one file each.

A command imports what it needs when it runs, so that ``instseg --help`` works without torch.
"""
