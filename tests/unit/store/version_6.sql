BEGIN TRANSACTION;
CREATE TABLE deliveries (
	delivery_key BIGINT NOT NULL, 
	run_key BIGINT NOT NULL, 
	batch_id VARCHAR(256) NOT NULL, 
	worker_id VARCHAR(512) NOT NULL, 
	device VARCHAR(512) NOT NULL, 
	attempt INTEGER NOT NULL, 
	engine_seconds FLOAT NOT NULL, 
	fresh INTEGER NOT NULL, 
	duplicates INTEGER NOT NULL, 
	prompt_tokens BIGINT NOT NULL, 
	received_at FLOAT NOT NULL, 
	PRIMARY KEY (delivery_key)
);
INSERT INTO "deliveries" VALUES(104939015344568696,1,'1','node-1','Tesla T4',1,2.0,3,0,30,1.7960393722046306133e+09);
INSERT INTO "deliveries" VALUES(2059603220318576195,1,'1','node-2','Tesla T4',2,2.0,1,2,30,1.79603937222410249717e+09);
INSERT INTO "deliveries" VALUES(4125359533153997396,1,'2','node-2','Tesla T4',1,2.0,1,0,10,1.79603937223191618922e+09);
INSERT INTO "deliveries" VALUES(336358451550597710,2,'00000000-0','node-1','Tesla T4',1,2.0,1,0,10,1.79603937223856949811e+09);
CREATE TABLE keepwarm_schema (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "keepwarm_schema" VALUES(6);
CREATE TABLE outcomes (
	run_key BIGINT NOT NULL, 
	claim_id VARCHAR(256) NOT NULL, 
	position BIGINT NOT NULL, 
	claim TEXT NOT NULL, 
	gold VARCHAR(64), 
	label VARCHAR(64), 
	probabilities TEXT, 
	mass FLOAT, 
	raw_text TEXT, 
	prompt_tokens INTEGER, 
	delivery_key BIGINT, 
	reason VARCHAR(64), 
	detail TEXT, 
	evidence TEXT, 
	failures INTEGER, 
	dropped BOOLEAN DEFAULT 0 NOT NULL, 
	PRIMARY KEY (run_key, claim_id)
)
 WITHOUT ROWID

;
INSERT INTO "outcomes" VALUES(1,'c0',0,'Claim 0, Łódź.','A','A','{"A":0.5,"B B":0.25,"C":0.25}',0.75,' one',10,104939015344568696,NULL,NULL,NULL,NULL,0);
INSERT INTO "outcomes" VALUES(1,'c1',1,'Claim 1, Łódź.','A','C','{"A":0.5,"B B":0.25,"C":0.25}',0.75,' one',10,104939015344568696,NULL,NULL,NULL,NULL,0);
INSERT INTO "outcomes" VALUES(1,'c2',2,'Claim 2, Łódź.',NULL,'B B','{"A":0.5,"B B":0.25,"C":0.25}',0.75,' one',10,104939015344568696,NULL,NULL,NULL,NULL,0);
INSERT INTO "outcomes" VALUES(1,'c3',3,'Claim 3, Łódź.','B B',NULL,NULL,NULL,NULL,NULL,972621401065073490,'too-long','it has 9,999 tokens','Long.',0,1);
INSERT INTO "outcomes" VALUES(1,'c4',4,'Claim 4, Łódź.',NULL,'C','{"A":0.5,"B B":0.25,"C":0.25}',0.75,' one',10,2059603220318576195,NULL,NULL,NULL,NULL,0);
INSERT INTO "outcomes" VALUES(1,'c5',5,'Claim 5, Łódź.',NULL,'INVALID','{"A":0.5,"B B":0.25,"C":0.25}',0.75,' one',10,4125359533153997396,NULL,NULL,NULL,NULL,0);
INSERT INTO "outcomes" VALUES(2,'c0',0,'Claim 0, Łódź.','B B',NULL,NULL,NULL,NULL,NULL,4206549260262582976,'too-long','it has 9,999 tokens','Long.',0,0);
INSERT INTO "outcomes" VALUES(2,'c1',1,'Claim 1, Łódź.',NULL,'A','{"A":0.5,"B B":0.25,"C":0.25}',0.75,' one',10,336358451550597710,NULL,NULL,NULL,NULL,0);
INSERT INTO "outcomes" VALUES(3,'c0',0,'Claim 0, Łódź.','B B',NULL,NULL,NULL,NULL,NULL,2067663139081954324,'too-long','it has 9,999 tokens','Long.',0,0);
INSERT INTO "outcomes" VALUES(3,'c1',1,'Claim 1, Łódź.','B B',NULL,NULL,NULL,NULL,NULL,1190224653678690304,'too-long','it has 9,999 tokens','Long.',0,0);
CREATE TABLE runs (
	run_key INTEGER NOT NULL, 
	run_id VARCHAR(256) NOT NULL, 
	run TEXT, 
	input TEXT, 
	lines BIGINT, 
	claims BIGINT, 
	repeated BIGINT, 
	rejected BIGINT, 
	returned BIGINT DEFAULT '0' NOT NULL, 
	first_seen FLOAT NOT NULL, 
	digest VARCHAR(64), 
	positions TEXT, 
	nowhere_since FLOAT, 
	PRIMARY KEY (run_key), 
	UNIQUE (run_id)
);
INSERT INTO "runs" VALUES(1,'run-60eefeb4a19b3f00','{"source":"claims.jsonl","source_digest":"src-00","context":{"model":"models/small","revision":"files-0011223344556677","dtype":"bfloat16","max_model_tokens":1024,"engine_arguments":[]},"prompt":{"name":"abc","instructions":"Decide whether the evidence supports the claim. Answer with one word: True if the evidence supports the claim, False if it contradicts it, Unknown if it does not decide.","examples":[],"template":"Evidence: {evidence}\nClaim: {claim}\nAnswer:","no_evidence":"none","labels":[{"name":"A","word":"one","aliases":[]},{"name":"B B","word":"two","aliases":[]},{"name":"C","word":"three","aliases":[]}],"chat":true,"minimum_mass":0.01},"limit":null,"seed":null}',NULL,6,6,0,0,1,1.7960393722046306133e+09,'03ad4d3dcf6c806135f5b25ddd00f734',NULL,NULL);
INSERT INTO "runs" VALUES(2,'run-0a9cc00b8f4857d5','{"source":"other.jsonl","source_digest":"src-01","context":{"model":"models/small","revision":"files-0011223344556677","dtype":"bfloat16","max_model_tokens":1024,"engine_arguments":[]},"prompt":{"name":"abc","instructions":"Decide whether the evidence supports the claim. Answer with one word: True if the evidence supports the claim, False if it contradicts it, Unknown if it does not decide.","examples":[],"template":"Evidence: {evidence}\nClaim: {claim}\nAnswer:","no_evidence":"none","labels":[{"name":"A","word":"one","aliases":[]},{"name":"B B","word":"two","aliases":[]},{"name":"C","word":"three","aliases":[]}],"chat":true,"minimum_mass":0.01},"limit":null,"seed":null}',NULL,3,3,0,0,0,1.79603937223856949811e+09,'0a180ca9bb3c10eb241a375e017b0c68',NULL,NULL);
INSERT INTO "runs" VALUES(3,'run-7c703c89f965f43b','{"source":"third.jsonl","source_digest":"src-02","context":{"model":"models/small","revision":"files-0011223344556677","dtype":"bfloat16","max_model_tokens":1024,"engine_arguments":[]},"prompt":{"name":"abc","instructions":"Decide whether the evidence supports the claim. Answer with one word: True if the evidence supports the claim, False if it contradicts it, Unknown if it does not decide.","examples":[],"template":"Evidence: {evidence}\nClaim: {claim}\nAnswer:","no_evidence":"none","labels":[{"name":"A","word":"one","aliases":[]},{"name":"B B","word":"two","aliases":[]},{"name":"C","word":"three","aliases":[]}],"chat":true,"minimum_mass":0.01},"limit":null,"seed":null}',NULL,2,2,0,0,0,1.79603937224450683598e+09,'3ce2a0586774eef839ae025fa2fa45ce',NULL,NULL);
CREATE TABLE startups (
	startup_id VARCHAR(256) NOT NULL, 
	worker_id VARCHAR(512) NOT NULL, 
	context_id VARCHAR(256) NOT NULL, 
	device VARCHAR(512) NOT NULL, 
	warm BOOLEAN NOT NULL, 
	seconds FLOAT NOT NULL, 
	imports FLOAT, 
	fetch FLOAT, 
	load FLOAT, 
	compile FLOAT, 
	first_token FLOAT, 
	total FLOAT, 
	received_at FLOAT NOT NULL, 
	PRIMARY KEY (startup_id)
);
CREATE TABLE submissions (
	submission_id VARCHAR(256) NOT NULL, 
	run_key BIGINT NOT NULL, 
	cancelled_at FLOAT, 
	proof_key VARCHAR(64), 
	PRIMARY KEY (submission_id)
);
INSERT INTO "submissions" VALUES('sub-1',1,NULL,NULL);
INSERT INTO "submissions" VALUES('sub-2',2,1.79603937224330377575e+09,NULL);
INSERT INTO "submissions" VALUES('sub-3',3,NULL,NULL);
CREATE TABLE verdict_counts (
	run_key BIGINT NOT NULL, 
	label VARCHAR(64) NOT NULL, 
	verdicts BIGINT NOT NULL, 
	judged BIGINT NOT NULL, 
	correct BIGINT NOT NULL, 
	PRIMARY KEY (run_key, label)
);
INSERT INTO "verdict_counts" VALUES(1,'A',1,1,1);
INSERT INTO "verdict_counts" VALUES(1,'B B',1,0,0);
INSERT INTO "verdict_counts" VALUES(1,'C',2,1,0);
INSERT INTO "verdict_counts" VALUES(1,'INVALID',1,0,0);
INSERT INTO "verdict_counts" VALUES(2,'A',1,0,0);
CREATE TABLE verdict_digests (
	run_key BIGINT NOT NULL, 
	high BIGINT, 
	low BIGINT, 
	PRIMARY KEY (run_key)
);
INSERT INTO "verdict_digests" VALUES(1,1972882456599220797,2179748309972250404);
INSERT INTO "verdict_digests" VALUES(2,2382652241797459047,3796934011095795236);
CREATE INDEX ix_submissions_run_key ON submissions (run_key);
CREATE INDEX ix_deliveries_run_key ON deliveries (run_key);
CREATE INDEX outcomes_dead ON outcomes (run_key, reason) WHERE reason IS NOT NULL;
CREATE INDEX ix_startups_context_id ON startups (context_id);
COMMIT;
