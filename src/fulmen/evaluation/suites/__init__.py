"""Suites: what a model still does after its conversion, beyond the parity of its loss.

suite         what a suite is; catalog: all of them, a module each
run, report   all suites of one run; JSON, Markdown and HTML of it
responders    who answers: a converted model as dense, DSA and window; any dense model; endpoint: by HTTP
samples       what a task makes: a prompt of a given length and what must come back
ruler_tasks   RULER's tasks; word_lists: those that are lists of words
paired        tests and intervals of paired results
lm_eval_bridge the model for EleutherAI's harness, where that is installed
"""
