# Stand in for CANN's set_env.sh: it reads variables that may be unset, and one of its commands fails.
export LD_LIBRARY_PATH=$ASCEND_TOOLKIT_HOME/lib64:$LD_LIBRARY_PATH
export PYTHONPATH=$ASCEND_TOOLKIT_HOME/python/site-packages:$PYTHONPATH
false
export PATH=$FAKE_CANN_BIN:$PATH
