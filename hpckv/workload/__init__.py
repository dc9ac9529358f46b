"""One run on one allocation: input lines, plan, output, resume. Import its modules: signals must be blocked before numpy."""
