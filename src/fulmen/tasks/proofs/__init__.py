"""Proofs that a program can check, step by step, and faults whose place is known.

proof         a proof, what is found in it, and what a kind of proofs is
equations     linear equations, solved step by step; arithmetic: what their sides are worth
logic         propositional deduction; formulas and rules: what it is made of
words         word problems, one calculation for each sentence
labelled      proofs by index: half are sound, half have one fault; training and held-out ones differ
replies       what a verifier or a prover writes, read
verify_proof, prove   the two tasks; factory makes them by name
"""
