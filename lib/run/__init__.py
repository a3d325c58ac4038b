"""Everything between the command line and a member: commands, plan, runner, members, pool, search. No study and no shared
module imports it."""
