"""What every script needs of the machine: errors for people, files, devices, processes, seeds.

Nothing here knows of images, captions or models.
"""
