# shellcheck shell=sh
# Sourced by Apptainer when the image is started, before the host's variables are there; the rest is in hpckv_image.py.
export PATH="/opt/hpckv/bin:$PATH"
# The user's ~/.local must not stand in for the image's packages.
export PYTHONNOUSERSITE=1
