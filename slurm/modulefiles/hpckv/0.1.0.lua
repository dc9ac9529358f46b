-- hpckv for Lmod:
--
--   module use /project/hpckv/slurm/modulefiles && module load hpckv
--
-- Everything is found from where this file is, in the checkout: an image named hpckv.sif at its top, and what the site has written beside it,
-- site.yaml (sites/example.yaml) and site.sh (slurm/site/example.sh), are used where they are there. A user's own variables stay.
local home = myFileName():gsub("/slurm/modulefiles/hpckv/[^/]*$", "")

whatis("Name: hpckv")
whatis("Version: 0.1.0")
whatis("Description: batch inference that never computes the same prefix twice")
help([[
Batch inference for Slurm. hpckv --help says what there is; sbatch $HPCKV_HOME/slurm/single_a100.sh RUN.yaml runs a batch.
Before the first job: hpckv doctor DIR. Documentation: $HPCKV_HOME/docs.]])

setenv("HPCKV_HOME", home)
prepend_path("PATH", pathJoin(home, "slurm/bin"))
for variable, name in pairs({ HPCKV_SIF = "hpckv.sif", HPCKV_SITE = "site.yaml", HPCKV_SITE_SH = "site.sh" }) do
    local file, now = pathJoin(home, name), os.getenv(variable)
    if isFile(file) and (not now or now == file) then
        setenv(variable, file)
    end
end
-- Where the container runtime is a module; elsewhere it is there anyway.
try_load("apptainer")
