"""Turns the folder of a run into one self-contained page for somebody who was not there."""
