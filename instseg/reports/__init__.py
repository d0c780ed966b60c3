"""The work of ``instseg evaluate`` and ``instseg compare``: results and trainings as tables."""
