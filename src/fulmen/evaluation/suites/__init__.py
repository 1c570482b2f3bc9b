"""Suites of `fulmen eval`: what a model still does after its conversion, beyond the parity of its loss.

samples       what a task makes: a prompt of a given length and what must come back
ruler_tasks   RULER's tasks; word_lists: those that are lists of words
subjects      who answers: a converted model as dense, DSA and window; any dense model; an endpoint
journal       results of samples on disk, so that an interrupted run goes on
ruler, keyloss, short, generation     the suites: units of work, and tables of their records
paired        tests and intervals of paired results
suite_report, suite_page              JSON, Markdown and HTML of a run
lm_eval_bridge                        the model for EleutherAI's harness, where that is installed
"""
