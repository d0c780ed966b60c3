"""The projects of this repository; others may be installed beside them."""

from instseg.projects import Project, folders, projects

PROJECTS: list[Project] = [project for project in projects() if project.name in folders()]
