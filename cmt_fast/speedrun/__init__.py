"""The speedrun: who comes to a distance at one step with the least network work, from random weights. Rules: docs/speedrun.md.

tracks.py     what is fixed: data, network, judge, target; whether a recipe keeps to it
attempt.py    training over seeds, judging, the log
logs.py       a log of an attempt: JSON lines, and what they add up to
records.py    the records, when one counts, and the table
verifying.py  a record looked at again, in short or in full
student.py    the t test
"""
