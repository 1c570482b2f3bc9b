"""Made-up worlds for agents, all code: database, tools, question, solution by the tools alone, verifier.

registry     the database of ships, captains, ports and cargoes, and its tools
questions    what is asked of it, from one look-up to changes after a comparison
world        one question with its database, solved and verified when it is made
plans, task  the same in one turn, for training: all calls at once (`world:level=3`)
documents    the same records as texts, and real texts: questions that one reply answers
"""
